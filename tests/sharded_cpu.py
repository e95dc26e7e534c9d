"""Runs 04_train_stepdpo.py under accelerate's FSDP or DeepSpeed without a GPU.

    accelerate launch --config_file configs/fsdp2.yaml --num_processes 2 --mixed_precision no \\
        tests/sharded_cpu.py OPTIONS

accelerate 1.15 gives these up where it finds no GPU. Here it is told that processes of gloo are
several GPUs, device "cpu"."""

import importlib
import os
import sys
from pathlib import Path

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
import tyro
from accelerate.state import DistributedType, PartialState

PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    # compiled in minutes, and used by inference alone; `deepspeed.comm.torch` itself is torch
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
sys.path.insert(0, str(Path(__file__).parents[1]))
train = importlib.import_module("04_train_stepdpo")
train.LOGITS_BYTES[0] = 1024 * 4 * 512  # one pair's suffixes have more than 1,024 tokens
train.main(tyro.cli(train.Args))
