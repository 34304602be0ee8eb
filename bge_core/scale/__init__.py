"""More than one machine: table steps, shards, Ray Data."""
