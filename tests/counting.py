"""What the tests count in place of seconds: the operations of PyTorch, and the calls of Python."""

import sys
from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

# Operations that wait for the device, or whose size only the values tell
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "bincount", "_unique2", "equal", "is_nonzero"}
MADE_ON_HOST = "lift_fresh"  # What `torch.tensor` and `new_tensor` end in: on a card a copy of the number, for which the host waits until all before it is done


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch by name, such as `copy_`."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


class Calls(list):
    """A list that gets an entry for each function that is called, of Python or of C, in this thread while it is a context."""

    def __enter__(self):
        sys.setprofile(lambda frame, event, arg: self.append(event) if event in ("call", "c_call") else None)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)
        del self[-2:]  # This exit, and the end of the profile
