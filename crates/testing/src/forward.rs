//! Calls that a wrapper in a test passes on to what it wraps, so that it only states what it changes.
//!
//! The macros name no crate but the caller's own dependencies, since this crate depends on none of them. The first
//! argument is how a call reaches what is wrapped; it may refuse with `?`.

/// Methods of `limosa_client::Device`. `registers` are all but `name`, `identity`, `feature`, `reset` and `info`.
#[macro_export]
macro_rules! forward_device {
    (|$this:ident| $to:expr; $($method:ident),+) => {
        $($crate::forward_device!(@$method $this $to);)+
    };
    (@name $this:ident $to:expr) => {
        fn name(&self) -> &str {
            let $this = self;
            $to.name()
        }
    };
    (@identity $this:ident $to:expr) => {
        fn identity(&self) -> Option<limosa_client::DeviceIdentity> {
            let $this = self;
            $to.identity()
        }
    };
    (@reset $this:ident $to:expr) => {
        fn reset(&self) -> limosa_client::Result<()> {
            let $this = self;
            $to.reset()
        }
    };
    (@info $this:ident $to:expr) => {
        fn info(&self) -> limosa_client::Result<limosa_protocol::info::DeviceInfo> {
            let $this = self;
            $to.info()
        }
    };
    (@registers $this:ident $to:expr) => {
        fn region(&self, index: u32) -> limosa_client::Result<limosa_client::Region> {
            let $this = self;
            $to.region(index)
        }
        fn irq(&self, index: u32) -> limosa_client::Result<limosa_protocol::info::IrqInfo> {
            let $this = self;
            $to.irq(index)
        }
        fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> limosa_client::Result<()> {
            let $this = self;
            $to.region_read(region, offset, data)
        }
        fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> limosa_client::Result<()> {
            let $this = self;
            $to.region_write(region, offset, data)
        }
        fn set_irqs(
            &self,
            index: u32,
            start: u32,
            action: limosa_client::IrqAction<'_>,
        ) -> limosa_client::Result<()> {
            let $this = self;
            $to.set_irqs(index, start, action)
        }
        fn dma_map(&self, map: &limosa_client::DmaMap<'_>) -> limosa_client::Result<()> {
            let $this = self;
            $to.dma_map(map)
        }
        fn dma_unmap(
            &self,
            iova: u64,
            size: u64,
            dirty: Option<limosa_client::DirtyBits<'_>>,
        ) -> limosa_client::Result<()> {
            let $this = self;
            $to.dma_unmap(iova, size, dirty)
        }
    };
}

/// Methods of `limosa_client::DataStream`.
#[macro_export]
macro_rules! forward_stream {
    (|$this:ident| $to:expr; $($method:ident),+) => {
        $($crate::forward_stream!(@$method $this $to);)+
    };
    (@read $this:ident $to:expr) => {
        fn read(&mut self, data: &mut [u8]) -> limosa_client::Result<limosa_client::Chunk> {
            let $this = self;
            $to.read(data)
        }
    };
    (@write $this:ident $to:expr) => {
        fn write(&mut self, data: &[u8]) -> limosa_client::Result<()> {
            let $this = self;
            $to.write(data)
        }
    };
    (@precopy_info $this:ident $to:expr) => {
        fn precopy_info(&mut self) -> limosa_client::Result<limosa_protocol::feature::PrecopyInfo> {
            let $this = self;
            $to.precopy_info()
        }
    };
    (@transfer_bytes_max $this:ident $to:expr) => {
        fn transfer_bytes_max(&self) -> usize {
            let $this = self;
            $to.transfer_bytes_max()
        }
    };
}

/// Methods of `limosa_migrate::link::Link`. `Wait` and `LinkError` are those that the caller has imported, so that the
/// unit tests of that crate can use it too.
#[macro_export]
macro_rules! forward_link {
    (|$this:ident| $to:expr; $($method:ident),+) => {
        $($crate::forward_link!(@$method $this $to);)+
    };
    (@write $this:ident $to:expr) => {
        fn write(&self, slices: &[std::io::IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
            let $this = self;
            $to.write(slices, wait)
        }
    };
    (@read $this:ident $to:expr) => {
        fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
            let $this = self;
            $to.read(into, wait)
        }
    };
    (@finish $this:ident $to:expr) => {
        fn finish(&self) {
            let $this = self;
            $to.finish();
        }
    };
    (@peer $this:ident $to:expr) => {
        fn peer(&self) -> &str {
            let $this = self;
            $to.peer()
        }
    };
}
