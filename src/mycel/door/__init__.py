"""The door: an HTTP server that any OpenAI client can talk to, over any back end of the generation room."""
