"""What recipes cost on which links, worked out instead of run: payload, wire bytes, seconds, a recommendation."""
