"""Print what decides which wheels fit an interpreter: Python, processor, C library."""

import platform
import sys

print(
    f"Python {sys.version_info[0]}.{sys.version_info[1]}",
    platform.machine(),
    platform.libc_ver()[0],
)
