"""What every op family stands on: router, plans, devices, threads, errors, test helpers."""
