"""What holds for all tests."""

import signal

# A shell starts what it sends to the background with SIGINT ignored, and children inherit that: then no Ctrl-C that a
# test sends would arrive. A handler of ours is the default again in every program that is started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
