"""Which backend runs an op: ask (`explain`) and measure (`tune`)."""
