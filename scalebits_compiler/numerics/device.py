"""Where tensors are and where they are computed with (layer L0; imports no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """The device that computes, as torch names it ("cpu", "cuda").

    streamed: what is as large as the model stays on the host, and what an op or a layer needs of it
    comes to the device when that runs; else it is kept on the device. Results are the same.
    """

    device: str = "cpu"
    streamed: bool = False

    @property
    def home(self) -> str:
        """The device that keeps what is as large as the model."""
        return "cpu" if self.streamed else self.device

    def here(self, tensor: Tensor) -> Tensor:
        """The tensor on the device that computes."""
        return tensor.to(self.device)

    def table(self, keys: Iterable[str], make: Callable[[str], T]) -> Mapping[str, T]:
        """key -> make(key): all made now, or streamed, each when it is asked for, every time."""
        return OnDemand(tuple(keys), make) if self.streamed else {key: make(key) for key in keys}


class OnDemand(Mapping[str, T], Generic[T]):
    """key -> what `make` gives for it; nothing is kept."""

    def __init__(self, keys: tuple[str, ...], make: Callable[[str], T]) -> None:
        self._keys, self._make = dict.fromkeys(keys), make

    def __getitem__(self, key: str) -> T:
        if key not in self._keys:
            raise KeyError(key)
        return self._make(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
