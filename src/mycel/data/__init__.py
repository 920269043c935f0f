"""Data: whose examples, how they spread over parties, and the tokens a node trains on."""
