"""Federation between organisations, over Flower, whose apps are relays without state on sockets of our processes."""
