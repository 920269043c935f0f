"""Federation between organisations: parcels travel through Flower's SuperLink and SuperNodes.

``coordinator's process <-> ServerApp <-> SuperLink <-> SuperNode <-> ClientApp <-> party's process``

Flower's two apps are relays without state (`apps.py`); what decides and what works are processes of our own, which
speak to them over a local socket (`engines/line.py`). So a party's model and data stay loaded between messages, and a
coordinator's folder, log and checkpoints are where every other run keeps them.
"""
