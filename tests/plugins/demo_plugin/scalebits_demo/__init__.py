"""A plugin of scalebits-compiler, as its users write them. Found by its entry point."""

from scalebits_compiler.plugins import Plugin
from scalebits_demo.ops import Gelu, gelu
from scalebits_demo.passes import BitHistogram, KeepEdges, MagnitudeSensitivity

PLUGIN = Plugin(
    passes=(KeepEdges, BitHistogram, MagnitudeSensitivity), ops=(Gelu,), rules={Gelu: gelu}
)
