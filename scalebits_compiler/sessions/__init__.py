"""Opens an artifact in the runtime that fits it, with torch where the runtime lacks an op."""
