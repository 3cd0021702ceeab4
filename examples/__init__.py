"""Programs that show structc at work; each has a main() and runs on two CPU cores."""
