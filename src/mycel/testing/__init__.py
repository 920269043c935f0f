"""Conformance suites: the laws that every part of a kind obeys, ours or a stranger's.

Each suite takes a part, or what makes one, and raises ``AssertionError`` with the law that is broken. They need no
test framework, no network and no trained model.
"""

from mycel.testing.codecs import check_codec
from mycel.testing.combine import check_combine
from mycel.testing.decisions import check_decision
from mycel.testing.engines import check_engine
from mycel.testing.guards import check_filter, check_guard
from mycel.testing.paces import check_pace
from mycel.testing.peers import check_peers
from mycel.testing.policies import check_policy
from mycel.testing.trainables import check_trainable

__all__ = [
    "check_codec",
    "check_combine",
    "check_decision",
    "check_engine",
    "check_filter",
    "check_guard",
    "check_pace",
    "check_peers",
    "check_policy",
    "check_trainable",
]
