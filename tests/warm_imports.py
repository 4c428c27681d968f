"""What a process of this project imports sooner or later, and no thread; see ``warm.py``."""

from __future__ import annotations

import gc
import os

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import torch
import torch.distributed.fsdp
import torch.profiler
import torch.utils.tensorboard
import tqdm
import transformers.models.llama.modeling_llama  # noqa: F401

import qlora_pl.cli  # noqa: F401

tqdm.tqdm.monitor_interval = 0  # its bars would start a thread
torch.set_num_threads(1)
if len(os.listdir("/proc/self/task")) > 1:
    raise RuntimeError("A library starts threads when it is imported; a fork would lack them.")
gc.collect()
gc.freeze()  # what is never looked through is also never copied
