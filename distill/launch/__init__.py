"""Many machines: a scheduler's environment flows in, a worker's place among workers and job scripts flow out."""
