"""Observation in robot units -> action chunk in robot units; pure, without rclpy."""
