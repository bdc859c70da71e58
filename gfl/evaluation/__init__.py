"""COCO AP, its bootstrap intervals, and speed under a recorded protocol."""
