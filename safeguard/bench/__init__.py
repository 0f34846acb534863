"""Speed of checks beside what others would use, interleaved on one machine: `safeguard bench`."""
