from .rectified_flow import RFlowScheduler, timestep_transform

__all__ = ["RFlowScheduler", "timestep_transform"]
