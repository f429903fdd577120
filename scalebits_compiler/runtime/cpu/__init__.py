"""The native CPU runtime: kernel libraries, programs, threads."""
