"""A kernel that streams bytes into shared memory and does nothing with them."""

def available(device: int = 0) -> str:
    """Why this machine cannot run it; empty if it can."""

def stream(address: int, num_bytes: int, device: int, stream: int, /) -> None:
    """Enqueue a launch on all SMs that reads so many bytes; both multiples of 16."""
