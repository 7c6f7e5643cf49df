"""What workers hold alike: how it is compared, and made equal."""
