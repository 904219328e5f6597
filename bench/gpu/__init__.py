"""All that a GPU can tell, in one command that fits into some minutes; ``python -m bench gpu --help``."""
