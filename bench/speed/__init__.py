"""How long a step takes, and what it costs the host: beside the published code, and beside focal loss."""
