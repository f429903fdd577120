"""The passes (layer L2), one file each, and what runs and watches them."""
