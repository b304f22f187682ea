"""The network: backbone, routing, experts. Knows of no training and no file.

Start with dit.py (the whole network), then moe.py (one MoE layer) and routing.py (which expert
takes which token). initialization.py: how parameters start. routing_mode.py: how evaluation routes.
"""
