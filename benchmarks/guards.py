"""The guards that benchmarks compare, as changes to a recipe."""

from __future__ import annotations

from typing import Any

GUARDS: dict[str, dict[str, Any]] = {
    "none": {},
    "masked sums": {"guard.sums": "sparsely-masked", "wire.codec": "fixed(16,0.5)"},
    "masks, everyone with everyone": {"guard.sums": "masked", "wire.codec": "fixed(16,0.5)"},
    "encrypted sums": {"guard.sums": "homomorphic"},
    "sums in the simulated enclave": {"guard.sums": "enclave"},
    "user noise at epsilon 30": {"guard.private": "user", "guard.epsilon": 30.0, "guard.clip_norm": 0.5},
    "example noise at epsilon 8": {"guard.private": "example", "guard.epsilon": 8.0, "guard.clip_norm": 1.0},
    "local noise at epsilon 30": {"guard.private": "local", "guard.epsilon": 30.0, "guard.clip_norm": 0.5},
    "norm bound": {"guard.filter": "norm_bound(1.0)"},
    "median": {"guard.filter": "median"},
    "trimmed mean": {"guard.filter": "trimmed_mean(0.34)"},
    "geometric median": {"guard.filter": "geometric_median"},
    "Krum": {"guard.filter": "krum(0.34)"},
    "multi-Krum": {"guard.filter": "multi_krum(0.34)"},
    "FoolsGold": {"guard.filter": "foolsgold"},
    "FLTrust": {"guard.filter": "fltrust", "guard.root": "python-library"},
}
