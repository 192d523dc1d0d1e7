"""Remora's parts that Kubernetes itself talks to."""
