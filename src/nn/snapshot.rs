//! The state of a network between two steps, kept on its device: taken and put back without a copy to the host.

use super::network::Network;
use crate::device::Buffer;
use crate::error::Result;

/// Weights, the optimizer's state and statistics of a network.
pub struct Snapshot {
    parameters: Buffer<f32>,
    moments: [Buffer<f32>; 2],
    statistics: Buffer<f32>,
}

impl Snapshot {
    /// Memory for the state of a network.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when memory runs out.
    pub fn new(network: &Network) -> Result<Self> {
        let alloc = |buffer: &Buffer<f32>| network.device.alloc(buffer.len());
        let [first, second] = &network.moments;
        Ok(Snapshot {
            parameters: alloc(&network.parameters)?,
            moments: [alloc(first)?, alloc(second)?],
            statistics: alloc(&network.statistics)?,
        })
    }

    /// Keeps the state that a network has now.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn take(&mut self, network: &Network) -> Result<()> {
        let device = &network.device;
        device.copy(network.parameters.view(), self.parameters.view_mut())?;
        device.copy(network.statistics.view(), self.statistics.view_mut())?;
        let moments = network.moments.iter().zip(&mut self.moments);
        moments.into_iter().try_for_each(|(from, to)| device.copy(from.view(), to.view_mut()))
    }

    /// Gives the network the state back that it had.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device fails.
    pub fn restore(&self, network: &mut Network) -> Result<()> {
        let Network { device, parameters, moments, statistics, .. } = network;
        device.copy(self.parameters.view(), parameters.view_mut())?;
        device.copy(self.statistics.view(), statistics.view_mut())?;
        let mut moments = self.moments.iter().zip(moments);
        moments.try_for_each(|(from, to)| device.copy(from.view(), to.view_mut()))?;
        network.round()
    }
}
