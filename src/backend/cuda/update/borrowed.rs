//! The update alone, of arrays that somebody else owns: cudarc's slices, or addresses.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut, DeviceRepr, SyncOnDrop};
use half::bf16;

use super::{Arrays, Prepared};
use crate::backend::cuda::Storage;
use crate::backend::cuda::context::driver_error;
use crate::error::{Error, Result};
use crate::optim::{StepOutcome, StepParams};
use crate::plan::ALIGNMENT;

/// What an address must be a multiple of.
const ADDRESS_ALIGNMENT: u64 = 16;

impl Prepared {
    /// Number of elements that every array must have: the padded length of the plan's layout.
    pub fn array_len(&self) -> usize {
        self.plan.block_groups.len() * ALIGNMENT
    }

    /// One update of f32 arrays, as [`crate::backend::cpu::update`] does it, to the bit (Muon up to the rounding of its
    /// products): parameters and slots `=`, gradients left as they are or set to 0. Queued on the stream of the device that
    /// this was prepared for, after what is queued there and on the slices' own streams. Waits for its end.
    ///
    /// # Errors
    /// Arrays that do not fit the plan, arrays of another context, what [`StepParams::check`] refuses, or a device that failed.
    pub fn update(
        &mut self,
        parameters: &mut CudaSlice<f32>,
        gradients: &mut CudaSlice<f32>,
        slots: &mut [&mut CudaSlice<f32>],
        step: &StepParams,
    ) -> Result<StepOutcome> {
        self.update_slices(parameters, gradients, None::<&mut CudaSlice<f32>>, slots, step)
    }

    /// As [`Prepared::update`], with gradients of another type, and a copy of the parameters in another type that is written in
    /// the same pass. Of gradients and copy there are: f32 with any, bf16 with bf16, f16 with f16.
    ///
    /// # Errors
    /// As [`Prepared::update`], and types that there is no kernel for.
    pub fn update_with_copy<G: Storage + DeviceRepr, C: Storage + DeviceRepr>(
        &mut self,
        parameters: &mut CudaSlice<f32>,
        gradients: &mut CudaSlice<G>,
        copy: &mut CudaSlice<C>,
        slots: &mut [&mut CudaSlice<f32>],
        step: &StepParams,
    ) -> Result<StepOutcome> {
        self.update_slices(parameters, gradients, Some(copy), slots, step)
    }

    /// As [`Prepared::update`], of parameters that are kept in bf16 alone, with gradients in f32 or bf16: computed in f32 and rounded
    /// stochastically, as [`crate::backend::cpu::update_bf16`] does it, by the seed that the plan's
    /// [`crate::optim::UpdatePlan::rounding`] names.
    ///
    /// # Errors
    /// As [`Prepared::update_with_copy`], and a plan without that seed.
    pub fn update_bf16<G: Storage + DeviceRepr>(
        &mut self,
        parameters: &mut CudaSlice<bf16>,
        gradients: &mut CudaSlice<G>,
        slots: &mut [&mut CudaSlice<f32>],
        step: &StepParams,
    ) -> Result<StepOutcome> {
        self.update_slices(parameters, gradients, None::<&mut CudaSlice<bf16>>, slots, step)
    }

    fn update_slices<P: Storage + DeviceRepr, G: Storage + DeviceRepr, C: Storage + DeviceRepr>(
        &mut self,
        parameters: &mut CudaSlice<P>,
        gradients: &mut CudaSlice<G>,
        copy: Option<&mut CudaSlice<C>>,
        slots: &mut [&mut CudaSlice<f32>],
        step: &StepParams,
    ) -> Result<StepOutcome> {
        let device = self.device.clone();
        let _claim = device.claim();
        let stream = device.stream().clone();
        let checks = Checks { len: self.array_len(), stream: &stream };
        checks.slots(slots.len(), self.plan.slots.len())?;
        // Each guard, when it is dropped after the work is queued, tells other streams of cudarc's to wait for it.
        let mut guards: Vec<SyncOnDrop<'_>> = Vec::new();
        let mut arrays = Arrays {
            parameters: checks.address("parameters", parameters, &mut guards)?,
            gradients: checks.address("gradients", gradients, &mut guards)?,
            copy: 0,
            slots: [0; 2],
            types: [P::NAME, G::NAME, C::NAME],
        };
        if let Some(copy) = copy {
            arrays.copy = checks.address("the copy", copy, &mut guards)?;
        }
        for (to, slot) in arrays.slots.iter_mut().zip(slots) {
            *to = checks.address("a slot", slot, &mut guards)?;
        }
        // SAFETY: the slices are of this context and of the plan's length, borrowed for as long as the work takes, and their
        // types are named.
        unsafe { self.update_at(&arrays, step) }
    }

    /// As [`Prepared::update_with_copy`], by addresses: of cudarc's slices, of PyTorch's tensors, of anything in the memory of the
    /// device. `arrays.copy` and slots that the rules do not keep are 0.
    ///
    /// # Errors
    /// An address that is no multiple of 16, a slot that is missing, types that there is no kernel for, what [`StepParams::check`]
    /// refuses, or a device that failed.
    ///
    /// # Safety
    /// Every address that is not 0 holds [`Prepared::array_len`] values of its type, in memory that this device's context may
    /// read and write; no two overlap; and nothing else reads or writes them from now until this returns, other than what is
    /// queued on this device's stream already.
    pub unsafe fn update_at(&mut self, arrays: &Arrays, step: &StepParams) -> Result<StepOutcome> {
        self.check_types(arrays.types, arrays.copy != 0)?;
        let needed =
            [arrays.parameters, arrays.gradients].into_iter().chain(arrays.slots).take(2 + self.plan.slots.len());
        if needed.clone().any(|address| address == 0) {
            let expected = format!("parameters, gradients and {} slots", self.plan.slots.len());
            return Err(Error::shape("update", expected, "an address of 0"));
        }
        if let Some(odd) = needed.chain([arrays.copy]).find(|address| !address.is_multiple_of(ADDRESS_ALIGNMENT)) {
            return Err(Error::shape("update", "addresses that are multiples of 16", format!("{odd:#x}")));
        }
        self.device.bind()?;
        self.prepare(step)?;
        self.queue(arrays, step.zero_gradients, self.params.address_of(0))?;
        self.outcome()
    }
}

/// What is asked of every slice.
struct Checks<'a> {
    len: usize,
    stream: &'a Arc<CudaStream>,
}

impl<'a> Checks<'a> {
    fn slots(&self, found: usize, expected: usize) -> Result<()> {
        if found == expected {
            return Ok(());
        }
        Err(Error::shape("update", format!("{expected} slots"), found.to_string()))
    }

    fn address<T>(&self, what: &str, slice: &'a mut CudaSlice<T>, guards: &mut Vec<SyncOnDrop<'a>>) -> Result<u64> {
        if slice.len() != self.len {
            return Err(Error::shape("update", format!("{what} of {} elements", self.len), slice.len().to_string()));
        }
        if slice.stream().context() != self.stream.context() {
            return Err(Error::shape(
                "update",
                format!("{what} of the context of the plan's device"),
                "another context's",
            ));
        }
        if slice.stream() != self.stream {
            // cudarc tracks events only in a context that it made several streams in.
            self.stream.join(slice.stream()).map_err(|error| driver_error("wait for the slice's stream", error))?;
        }
        let (address, guard) = slice.device_ptr_mut(self.stream);
        guards.push(guard);
        Ok(address)
    }
}
