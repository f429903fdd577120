"""How kernels are started: Triton source, or compiled binaries through the driver."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.runtime.cuda.driver import Driver, Function
from scalebits_compiler.runtime.cuda.kernels import Grid
from scalebits_compiler.runtime.kernel_files import Tell, say
from scalebits_compiler.runtime.manifest import COMPILE_AGAIN


class SourceLauncher:
    """Compiles a kernel when it is first started; runs it on the CPU under TRITON_INTERPRET=1.

    source: the text of the Python module with the Triton kernels. It runs in this process.
    """

    def __init__(self, source: bytes, kernels: Mapping[str, Any]) -> None:
        self._source, self._table = source, kernels
        self._module: ModuleType | None = None

    def launch(self, kernel: str, grid: Grid, arguments: Sequence[torch.Tensor | int]) -> None:
        """Start a kernel; see `kernels.Launcher`."""
        if self._module is None:
            self._module = _imported(self._source)
        options = {"num_warps": self._table[kernel]["warps"]}
        options["num_stages"] = self._table[kernel]["stages"]
        getattr(self._module, kernel)[grid](*arguments, **options)


def _imported(source: bytes) -> ModuleType:
    """The module of a source that was checked; no file is read, which could have changed since."""
    name = f"scalebits_kernels_{hashlib.sha256(source).hexdigest()[:16]}"
    module = ModuleType(name)
    try:
        text = source.decode()
        # Triton reads the text of a function through the cache of source lines.
        linecache.cache[f"<{name}>"] = (len(text), None, text.splitlines(True), f"<{name}>")
        exec(compile(text, f"<{name}>", "exec"), vars(module))
    except ImportError as error:
        raise ArtifactError(
            f"the source of the kernels needs {error.name}, which is not installed",
            help='pip install "scalebits-compiler[cuda]"',
        ) from error
    except (UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise ArtifactError(
            f"the source of the kernels cannot be imported: {error}", help=COMPILE_AGAIN
        ) from error
    return module


class BinaryLauncher:
    """Loads the binaries of a device's architecture; nothing is compiled.

    A binary that is missing, or that the driver refuses, is replaced by its source, which Triton
    compiles; `tell` is given one line about it. read: the bytes of a file that the table names;
    OSError if there is none.
    """

    def __init__(
        self,
        read: Callable[[str], bytes],
        kernels: Mapping[str, Any],
        fallback: SourceLauncher,
        tell: Tell = say,
    ) -> None:
        major, minor = torch.cuda.get_device_capability()
        self._read, self._table, self._fallback, self._tell = read, kernels, fallback, tell
        self._driver = Driver()
        self._capability = (major, minor)
        self._functions: dict[str, Function | None] = {}

    def launch(self, kernel: str, grid: Grid, arguments: Sequence[torch.Tensor | int]) -> None:
        """Start a kernel; see `kernels.Launcher`."""
        if kernel not in self._functions:
            self._functions[kernel] = self._load(kernel)
        function = self._functions[kernel]
        if function is None:
            self._fallback.launch(kernel, grid, arguments)
            return
        stream = torch.cuda.current_stream().cuda_stream
        given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        pointers = [isinstance(a, torch.Tensor) for a in arguments]
        self._driver.launch(function, grid, stream, list(zip(given, pointers, strict=True)))

    def _load(self, kernel: str) -> Function | None:
        entry = self._table[kernel]
        arch = best_binary(entry["binaries"], self._capability)
        name = "sm_{}{}".format(*self._capability)
        if arch is None:
            self._tell(f"no binary of {kernel} for {name}: compiling its source with Triton")
            return None
        binary = entry["binaries"][arch]
        try:
            image = self._read(binary["file"])
            return self._driver.load(
                image, kernel, binary["shared"], 32 * entry["warps"], binary["scratch"]
            )
        except OSError as error:
            self._tell(f"{binary['file']}: {error}: compiling its source with Triton")
            return None


def best_binary(binaries: Mapping[str, Any], capability: tuple[int, int]) -> str | None:
    """The architecture among `sm_XY` that a device runs best: same major, highest minor it has."""
    major, minor = capability
    fitting = [
        (int(arch[-1]), arch)
        for arch in binaries
        if int(arch[3:-1]) == major and int(arch[-1]) <= minor
    ]
    return max(fitting)[1] if fitting else None
