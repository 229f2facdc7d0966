"""`make cluster`: two database hosts, two worker hosts and an application host, all on one machine."""
