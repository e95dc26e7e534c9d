"""Runs a script under accelerate's FSDP or DeepSpeed without a GPU.

    accelerate launch --config_file configs/fsdp2.yaml --num_processes 2 --mixed_precision no tests/sharded_cpu.py SCRIPT ...

accelerate 1.15 gives these up where it finds no GPU. Here it is told that processes of gloo are several GPUs, device "cpu".
"""

import os
import runpy
import sys

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
from accelerate.state import DistributedType, PartialState

PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
