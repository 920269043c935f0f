"""A federation between organisations: the coordinator's hub, a member's seat, their keys and their consent."""
