"""From a form to a running kernel: build, check, time, attach."""
