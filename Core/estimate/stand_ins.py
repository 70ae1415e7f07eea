"""What takes the place of files and of other processes: a tokenizer that counts letters, and processes that agree."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.optim import Optimizer

from Core.utils.distributed import Distributed

LETTERS_PER_TOKEN = 4  # of English text, about
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TokenBatch(SimpleNamespace):
    """``input_ids`` and ``attention_mask`` [N, L]."""

    def to(self, device: Any) -> "TokenBatch":
        return self

    def __getitem__(self, key: str) -> Tensor:
        return getattr(self, key)


class StandInTokens:
    """A tokenizer without a vocabulary: as many tokens as a text is likely to have, all of them 0."""

    name_or_path = "stand-in"

    def __call__(
        self, texts: str | Sequence[str], *, padding: Any = False, max_length: int = 1 << 20, **_: Any
    ):
        if isinstance(texts, str):
            return TokenBatch(input_ids=[0] * tokens_of(texts))
        lengths = [min(tokens_of(text), max_length) for text in texts]
        width = max_length if padding == "max_length" else max(lengths)
        mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
        return TokenBatch(input_ids=torch.zeros_like(mask), attention_mask=mask)

    def apply_chat_template(self, chats: Sequence[Any], **settings: Any) -> TokenBatch:
        joined = [" ".join(message["content"] for message in chat) for chat in chats]
        return self(joined, **settings)


def tokens_of(text: str) -> int:
    return len(text) // LETTERS_PER_TOKEN + 2  # and the end


@contextmanager
def absent_processes(count: int) -> Iterator[None]:
    """Within this context this process is the first of so many, and what it sends to the others goes nowhere.

    Raises:
        ValueError: processes are joined already.
    """
    if count == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise ValueError(
            "a run of several processes is not estimated within one; use `vader estimate --processes`"
        )
    torch.distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class AgreeingProcesses(Distributed):
    """This process of so many that all do the same; none of the others exists.

    Args:
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        count: of processes.
    """

    def __init__(self, mixed_precision: str, count: int = 1):
        self.precision, self.count = DTYPES.get(mixed_precision), count
        self._bucket: Tensor | None = None

    device = torch.device("cpu")
    rank = 0
    is_main = is_first_on_machine = True
    scales_gradients = False

    @property
    def num_processes(self) -> int:
        return self.count

    def autocast(self) -> AbstractContextManager:
        return torch.autocast("cpu", self.precision) if self.precision else nullcontext()

    def prepare(self, optimizer: Optimizer) -> Optimizer:
        return optimizer

    def backward(self, loss: Tensor) -> None:
        # torch.autograd.backward leaves the modes of torch functions, which what is recomputed should be in.
        _engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )

    def average_gradients(self, parameters: Iterable[nn.Parameter], flags: Sequence[bool]) -> list[bool]:
        super().average_gradients(parameters, flags)
        return list(flags)  # those that come back have no values

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))

    def optimizer_step(self, optimizer: Optimizer, grad_norm: float, faulty: bool) -> bool:
        optimizer.step()
        optimizer.zero_grad()
        return False

    def scaler_state(self) -> None:
        return None

    def gather(self, values: Tensor) -> Tensor:
        return torch.cat([values.detach()] * self.count)

    def gather_objects(self, objects: list[Any]) -> list[Any]:
        return list(objects)

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""

    def any(self, flag: bool) -> bool:
        return flag

    def close(self) -> None:
        """Nothing is open."""
