"""A stand-in for the text encoder's process: does by the prompt what a real one does by accident."""

import os
import sys

if __name__ == "__main__" and sys.argv[1] == "dies":
    os._exit(1)

import time
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from engine.text_service import serve
from engine.wan.checkpoints import WeightsError
from engine.wan.umt5 import PromptEncoder


def encode(prompt: str) -> Tensor:
    if prompt == "crash":
        os._exit(3)
    if prompt == "hang":
        time.sleep(60)
    if prompt == "nan":
        return torch.full((2, 4), torch.nan)
    if prompt == "wide":
        return torch.zeros(2, 9)
    return torch.full((len(prompt), 4), float(len(prompt)), dtype=torch.bfloat16)


def load() -> PromptEncoder:
    if sys.argv[1] == "broken":
        raise WeightsError("the file is damaged")
    return encode


if __name__ == "__main__":
    serve(Connection(int(sys.argv[2])), load)
