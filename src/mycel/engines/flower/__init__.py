"""Federation between organisations, over Flower: ``coordinator <-> ServerApp <-> SuperLink <-> SuperNode <-> party``.

Flower's apps (`apps.py`) are relays without state, on sockets (`engines/line.py`) of processes that decide and work.
"""
