"""The network: backbone, routing, experts."""
