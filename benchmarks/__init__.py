"""Measurements that documents quote; nothing here is a test."""
