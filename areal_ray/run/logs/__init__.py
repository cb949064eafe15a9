"""Lines of JSON that are added one by one and survive a crash: the ledger, metrics, sample ids."""
