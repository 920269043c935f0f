"""Generation as a service: key-value store, weight store, scheduler and executor, each exchangeable on its own."""
