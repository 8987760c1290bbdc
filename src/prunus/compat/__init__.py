"""The names of other libraries over ours, for those who come from there. Each module needs an extra of its own."""
