"""A recipe that fills every slot, and what tests of damaged directories share."""

from __future__ import annotations

import json
from pathlib import Path

from kompakt.compress.artifact import sha256

EVERYTHING = {
    "weights": {"method": "rtn", "group_size": 32, "activations": "fp8"},
    "attention": {"method": "sage", "mode": "int8_fp8", "min_tokens": 64},
    "kv_cache": {"method": "kv_int4"},
    "calibration": {"samples": 2, "length": 32},
    "evaluation": {"windows": 2, "window": 32},
}


def forge(directory: Path) -> None:
    """Checksums that fit what is there, as whoever changed a file on purpose would write them."""
    file = directory / "kompakt.json"
    try:
        content = json.loads(file.read_bytes())
        for part in ("checksums", "companions"):
            for name in content[part]:
                if (directory / name).is_file():
                    content[part][name] = sha256(directory / name)
        file.write_text(json.dumps(content))
    except (ValueError, TypeError, KeyError, OSError, RecursionError, UnicodeError):
        return


def peak_bytes() -> int:
    """Largest resident memory since `forget_peak`; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
