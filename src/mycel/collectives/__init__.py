"""Inside an island: ranks that run one program over `torch.distributed`, in any layout that divides."""
