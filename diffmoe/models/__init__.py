"""The network: backbone, routing, experts. Knows of no training and no file.

Start with dit.py (the whole network), then moe.py (one MoE layer), families/ (which expert takes
which token, one file each) and routing.py (what they share). initialization.py: how parameters
start. routing_mode.py: how evaluation routes.
"""
