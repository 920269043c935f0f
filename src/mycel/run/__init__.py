"""What happened: an append-only event log, checkpoints, results and a report, in one folder."""
