"""What every op family stands on: router, plans, devices, threads, errors, test helpers."""

import os

# The process that imported the first op. A child forked from it must not enter OpenMP (threads.py), and threads.py
# itself may be imported only there.
HOME_PROCESS = os.getpid()
