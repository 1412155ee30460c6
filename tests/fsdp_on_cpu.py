"""`finetune --fsdp` in a process without a GPU, for test_finetune.py.

accelerate shards on accelerators only: with CPU processes it would silently copy the model to each. Told that they are
accelerators, it shards over gloo; the line printed proves it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from liger_deploy import finetune, trainer


def main() -> int:
    create, plain = trainer.LigerTrainer.__init__, trainer.LigerTrainer.training_step

    def init(self: trainer.LigerTrainer, *args: Any, **kwargs: Any) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(self, *args, **kwargs)

    def step(self: trainer.LigerTrainer, model: torch.nn.Module, *rest: Any) -> torch.Tensor:
        if self.state.global_step == 0:
            kinds = {type(parameter).__name__ for parameter in model.parameters()}
            print(f"rank {self.args.process_index}: {self.accelerator.distributed_type} {kinds}", flush=True)
        return plain(self, model, *rest)

    trainer.LigerTrainer.__init__, trainer.LigerTrainer.training_step = init, step
    return finetune.main()


if __name__ == "__main__":
    sys.exit(main())
