"""What makes checks fast under load: length buckets, micro-batches across callers, a bounded result cache."""
